"""Of a layer and its dense layer: the link to it, its gradient, and the weight that it shows."""
