"""Strongroom: an encrypted-at-rest DICOM storage server. Gate, vault, supervisor and command line."""

__version__ = "0.1.0"
