// Command platforms checks the types of all packages, tests too, for platforms, as GOOS/GOARCH, that this machine is not. It
// reads the source of what they import, without the bodies of functions, which takes seconds where compiling takes minutes.
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/tools/go/packages"
)

func main() {
	ok := true
	for _, platform := range os.Args[1:] {
		errs, err := check(platform)
		if err != nil {
			errs = []error{err}
		}
		for _, err := range errs {
			fmt.Fprintf(os.Stderr, "%s: %v\n", platform, err)
			ok = false
		}
	}
	if !ok {
		os.Exit(1)
	}
}

// check returns what is wrong in the packages of this directory and those below.
func check(platform string) (errs []error, err error) {
	goos, goarch, _ := strings.Cut(platform, "/")
	dir, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	loaded, err := packages.Load(&packages.Config{
		Mode: packages.NeedName | packages.NeedImports | packages.NeedDeps | packages.NeedFiles | packages.NeedCompiledGoFiles |
			packages.NeedTypes | packages.NeedSyntax | packages.NeedTypesInfo | packages.NeedTypesSizes,
		Env:   append(os.Environ(), "CGO_ENABLED=0", "GOOS="+goos, "GOARCH="+goarch),
		Tests: true,
		ParseFile: func(files *token.FileSet, name string, source []byte) (*ast.File, error) {
			file, err := parser.ParseFile(files, name, source, parser.SkipObjectResolution)
			if file != nil && !strings.HasPrefix(name, dir+string(filepath.Separator)) {
				for _, decl := range file.Decls {
					if function, ok := decl.(*ast.FuncDecl); ok {
						function.Body = nil
					}
				}
			}
			return file, err
		},
	}, "./...")
	if err != nil {
		return nil, err
	}
	if len(loaded) == 0 {
		return nil, fmt.Errorf("there are no packages in %s", dir)
	}
	for _, p := range loaded { // but for those that these import, which miss the bodies of their functions
		if strings.HasSuffix(p.PkgPath, ".test") {
			continue // as the generated program that runs tests does
		}
		for _, err := range p.Errors {
			errs = append(errs, err)
		}
	}
	return errs, nil
}
