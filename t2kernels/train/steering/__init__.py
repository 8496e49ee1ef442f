"""What a run says about itself: warnings of a collapse, its history, a curve, the best expert so far."""
