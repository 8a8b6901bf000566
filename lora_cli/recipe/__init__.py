"""What the user asked for, as data: `load` turns YAML into a frozen, checked `Recipe`."""
