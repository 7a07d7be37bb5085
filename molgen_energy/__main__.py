from molgen_energy.cli import main

if __name__ == "__main__":  # a worker process reads this file too
    main()
