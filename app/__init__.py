"""The web app around `l2m_viz`: ``python -m app`` serves it on this machine only.

Layout and wiring; everything that computes or draws comes from the core.
"""

import os

# Before the first import of gradio, which reads it then: no telemetry, whatever the shell says.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Read when torch loads; the reason is in `l2m_viz.cli`.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
