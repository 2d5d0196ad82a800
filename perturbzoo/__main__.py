from perturbzoo.cli import main

main()
