"""From a file to a checked, named, loaded module."""
