"""Training that can be reproduced and differentiated."""
