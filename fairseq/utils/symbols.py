"""The symbols that every dictionary begins with; their places are their ids."""

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(len(SPECIAL_SYMBOLS))
