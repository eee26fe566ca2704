"""`wardround doctor`: a hospital's installation looked at from every side, one line a check, before anybody waits for it.

Nothing is changed, nothing of a patient leaves: records are opened here as training would, and only said to be sound.
"""
