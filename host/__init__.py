"""The command line and the embedded host: everything that runs without ComfyUI."""
