"""One model family a file; the class that all inherit from is `TextToVideoUNet` in vader.py."""
