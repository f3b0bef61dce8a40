"""Small networks that memcompile carries itself: demonstrations, known answers, tests."""
