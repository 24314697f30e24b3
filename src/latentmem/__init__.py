"""LatentMem: a learnable memory for teams of LLM agents, composed into latent tokens for each role and task.

Names are imported when first asked for, so `import latentmem` loads no torch. `__init__.pyi` lists the names, for the
loader and for type checkers. The loader makes sure that `latentmem.rollout` is always the function, not the module.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
