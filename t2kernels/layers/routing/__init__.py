"""Which experts each token of a forward uses: scopes, routes, and the routes of blocks that are computed again."""
