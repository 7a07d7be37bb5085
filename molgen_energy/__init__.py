"""molgen-energy: train and judge generative models of 3D molecules with energy losses."""

__version__ = "0.1.0"
