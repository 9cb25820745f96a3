"""Benchmarks and the demonstration: what Strongroom does beside other servers, on this machine."""
