"""`python -m evit_deploy` is `evit-deploy`."""

from evit_deploy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
