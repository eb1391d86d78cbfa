"""Deep Transformers for translation: fairseq's command lines and file formats, Admin initialisation first."""

__version__ = "1.0.0"
