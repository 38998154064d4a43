"""From videos and photographs of one's own to a data set: frames, masks, one framing, and where each was taken from.

Commands and configurations are not here: `graf capture` composes these parts.
"""
