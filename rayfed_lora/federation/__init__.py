"""The round loop and what it needs; knows no Ray and no torch."""
