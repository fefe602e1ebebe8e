"""What the scripts share. Each module is named after what it holds; none imports a script."""
