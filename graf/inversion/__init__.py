"""Finding an object in a photograph: its code, its class and its camera, by optimisation through the renderer."""
