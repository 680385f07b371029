"""Starting a program on the processes of one or more hosts: ``python3 -m tutel.launcher.run``."""
