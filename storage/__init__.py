"""What lies on disk: packs, deposits, the archive, key records, the index. Knows no DICOM library, no network."""
