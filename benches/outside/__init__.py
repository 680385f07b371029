"""Peers that live in processes and environments of their own: one sparse block, by turns with ours."""
