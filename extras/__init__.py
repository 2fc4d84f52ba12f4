"""What single flags ask for; vader.py trains without this folder."""
