"""What an administrator does to a set while a guest uses it."""
