"""Keys of a Strongroom store: seals, versions, slots, anchors, keyring. Knows no archive and no DICOM."""
