"""From annotated media files to a prepared folder: plan, parallel work, atomic assembly."""
