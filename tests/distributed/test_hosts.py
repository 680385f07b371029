"""Both methods of the README over two hosts: two network namespaces of this one, each with an address of its own."""

import os
import subprocess

from programs import TINY, finish, losses, missing, need, run, started
from pytest import fixture
from test_launch import expected

HELLOWORLD = ["-m", "tutel.examples.helloworld", *TINY]


class Host:
    """A network namespace."""

    def __init__(self, name, address):
        self.name = name
        self.address = address
        #: Puts a command into it.
        self.inside = ["ip", "netns", "exec", name]


@fixture(scope="module")
def hosts():
    need("ip", "iproute2")
    if os.geteuid() != 0:
        missing("only root can make network namespaces")
    net = os.getpid() % 250
    made = [Host(f"tutel-{os.getpid()}-{number}", f"10.213.{net}.{number}") for number in (1, 2)]
    try:
        for host in made:
            ip("netns", "add", host.name)
        ip("link", "add", "wire", "netns", made[0].name, "type", "veth", "peer", "name", "wire", "netns", made[1].name)
        for host in made:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", host.name, "link", "set", device, "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        missing(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def test_method_a(hosts):
    first = hosts[0].address
    place = ["python3", "-m", "torch.distributed.launch", "--nproc_per_node=1", "--nnodes=2", f"--master_addr={first}"]
    with (
        started([*hosts[0].inside, *place, "--node_rank=0", *HELLOWORLD]) as zero,
        started([*hosts[1].inside, *place, "--node_rank=1", *HELLOWORLD]) as one,
    ):
        assert losses(finish(zero)) == expected(2)
        assert finish(one) == ""


def test_method_b(hosts, tmp_path):
    need("mpiexec", "openmpi-bin")
    # In the place of ssh: it is called with a host and a command.
    agent = tmp_path / "agent"
    agent.write_text(f"""#!/bin/sh
        test "$1" = {hosts[1].address} || exit 9
        shift
        exec {" ".join(hosts[1].inside)} sh -c "$*"
    """)
    agent.chmod(0o755)
    mpiexec = ["mpiexec", "--allow-run-as-root", "--mca", "plm_rsh_agent", agent]
    first, second = (host.address for host in hosts)
    places = ["-host", f"{first},{second}", "-x", "LOCAL_SIZE=2", "-x", f"MASTER_ADDR={first}"]
    launcher = ["python3", "-m", "tutel.launcher.run"]
    printed = run([*hosts[0].inside, *mpiexec, *places, *launcher, *HELLOWORLD, "--use_2dh"])
    assert losses(printed) == expected(4)
