"""What every command needs: errors, the command line, where the project is. Plumbing only."""
