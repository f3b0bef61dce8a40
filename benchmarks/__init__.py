"""Measures compiled models side by side with dense ones."""
