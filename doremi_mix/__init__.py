"""doremi_mix: learn how much of each dataset to train on."""

__version__ = "0.1.0"
