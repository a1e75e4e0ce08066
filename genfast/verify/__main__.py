import sys

from genfast.verify import main

if __name__ == "__main__":
    sys.exit(main())
