"""Many rows, one loop: sequences, prefill, decoding, beams, speculation, scores. Knows no file and no kernel."""
