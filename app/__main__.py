"""``python -m app``: serve the app until Ctrl-C."""

import signal
import sys
from dataclasses import dataclass

import tyro

from l2m_viz.errors import L2MError


@dataclass(frozen=True)
class Cfg:
    """Match two images in the browser."""

    # Address to listen on. Only this machine can reach 127.0.0.1; another address opens the app to that network.
    host: str = "127.0.0.1"
    # TCP port.
    port: int = 7860
    # Open a browser window.
    inbrowser: bool = False


def main() -> None:
    """Entry point; an error the user can mend is one line on stderr and exit code 2."""
    cfg = tyro.cli(Cfg, prog="python -m app", config=(tyro.conf.FlagCreatePairsOff,))
    from app.server import launch
    from l2m_viz.parallel import keep_memory

    keep_memory()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # so that temporary files go also when we are told to end
    try:
        demo = launch(cfg.host, cfg.port, inbrowser=cfg.inbrowser)
        print(f"Lift to Match: {demo.local_url} (Ctrl-C ends it)", flush=True)
        demo.block_thread()
    except L2MError as error:
        print(f"app: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError:  # gradio's text names parameters that a command line has not
        print(
            f"app: cannot listen on {cfg.host}:{cfg.port}. Choose another --port (or --host).",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
