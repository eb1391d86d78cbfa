#!/usr/bin/env python3
"""fairseq's name for ``fairseq-average``."""

from fairseq.cli.average import main

if __name__ == "__main__":
    main(None)
