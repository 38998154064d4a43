"""One runnable module per published number; each writes its section of RESULTS.md. The program imports none of them."""
