"""Other libraries with pymerge as their engine. Nothing of pymerge imports this, but the commands named after them."""
