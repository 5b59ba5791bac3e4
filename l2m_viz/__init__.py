"""l2m_viz: lift one photo to 3D, learn from the lifted scene, match image pairs densely ("Lift to Match", ICCV 2025).

The names listed in ``__init__.pyi`` are the public API. Each is imported when it is first used, so that
``import l2m_viz`` costs milliseconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
