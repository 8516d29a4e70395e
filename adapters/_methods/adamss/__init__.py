"""AdaMSS: the method, the clusters of rows that it trains, and its budget."""
