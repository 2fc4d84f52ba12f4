"""One model family a file; the class that all inherit from is `VideoModel` in vader.py."""
