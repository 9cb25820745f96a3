"""The vault: holds the unlocked keyring, admits deposits, keeps the index, decides who may read what. No IP socket."""
