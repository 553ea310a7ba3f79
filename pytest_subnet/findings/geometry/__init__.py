"""Where in its matrices an update lies: off the principal entries, on the small ones?"""
