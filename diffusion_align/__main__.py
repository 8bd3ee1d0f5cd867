"""`python -m diffusion_align`: the command line, as launchers of several processes start it."""

from diffusion_align.cli import main

if __name__ == "__main__":
    main()
