"""Programs that run inside the sandbox.  Standard library only; each file is started by `launch.py` on its own."""
