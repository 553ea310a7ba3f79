"""How structured a matrix is: the rank of its displacement (Sindhwani, Sainath and Kumar 2015)."""
