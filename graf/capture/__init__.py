"""From videos and photographs of one's own to a data set: frames, masks, one framing, and from where each was taken.

Commands and configurations are not here: `graf capture` composes these parts.
"""
