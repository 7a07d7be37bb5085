from molgen_energy.cli import main

main()
