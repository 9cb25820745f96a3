"""The desk: finds and gives back, and stores what comes by the web. It has no key that opens anything."""
