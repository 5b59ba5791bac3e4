"""Entry point of the `l2m` command line."""

import os
import signal
import sys


def main() -> None:
    """Run a command; an error the user can mend is one line on stderr and exit code 2, an interrupt 130."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exit unwinds, so that no half-written file stays
    # Read when torch loads: threads that wait for each other sleep instead of spinning. On a busy machine spinning
    # takes the processor from the thread that is waited for, and everything takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # numba sets the OpenMP that it may share with torch to all cores as it starts, whatever the user asked for.
    if "OMP_NUM_THREADS" in os.environ:
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    try:
        from l2m_viz.commands import app  # seconds of imports, which Ctrl-C may interrupt
        from l2m_viz.errors import L2MError
        from l2m_viz.parallel import keep_memory

        keep_memory()
        try:
            app.cli(prog="l2m")
        except (L2MError, OSError) as error:
            print(f"l2m: {error}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
