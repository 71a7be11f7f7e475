// Package dockerfile reads our Dockerfiles with BuildKit's own parser: no daemon runs where the tests do.
package dockerfile

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

const root = "../../.."

// pins are of one program, where they stand.
var pins = regexp.MustCompile(`(ziglang|cargo-zigbuild)==([0-9.]+)`)

func read(t *testing.T, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func stages(t *testing.T, text []byte) []instructions.Stage {
	t.Helper()
	result, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, warning := range result.Warnings {
		t.Errorf("%s: %v", warning.Short, warning.Detail)
	}
	warn := func(rule, description, url, message string, _ []parser.Range) {
		t.Errorf("%s: %s (%s)", rule, message, description)
	}
	stages, _, err := instructions.Parse(result.AST, linter.New(&linter.Config{Warn: warn}))
	if err != nil {
		t.Fatal(err)
	}
	return stages
}

func TestDockerfilesReadAsBuildKitReadsThem(t *testing.T) {
	pinned := read(t, "manifests/images/requirements.txt")
	for _, program := range []string{"operator", "node-agent"} {
		t.Run(program, func(t *testing.T) {
			text := read(t, program+"/Dockerfile")
			stages := stages(t, text)
			if len(stages) != 2 || stages[0].Name != "build" {
				t.Fatalf("a stage that builds and one that is kept, not %d", len(stages))
			}
			user, entry := "", ""
			for index, stage := range stages {
				for _, command := range stage.Commands {
					switch command := command.(type) {
					case *instructions.RunCommand:
						// A shell reads it without running it.
						shell := exec.Command("sh", "-n")
						shell.Stdin = strings.NewReader(strings.Join(command.CmdLine, " "))
						if output, err := shell.CombinedOutput(); err != nil {
							t.Errorf("%v: %s: %v", err, output, command.CmdLine)
						}
					case *instructions.CopyCommand:
						if command.From != "" && command.From != stages[0].Name {
							t.Errorf("there is no stage %q", command.From)
						}
						for _, source := range command.SourcePaths {
							if command.From == "" {
								if _, err := os.Stat(filepath.Join(root, source)); err != nil {
									t.Error(err)
								}
							} else if !strings.HasPrefix(source, "/image") {
								t.Errorf("%s is not what the first stage leaves", source)
							}
						}
					case *instructions.UserCommand:
						user = command.User
					case *instructions.EntrypointCommand:
						entry = strings.Join(command.CmdLine, " ")
					}
				}
				if index == 1 && !strings.Contains(stage.BaseName, "distroless") {
					t.Errorf("the image stands on %s", stage.BaseName)
				}
			}
			if user != "65532:65532" || entry != "/usr/bin/freehold-"+program {
				t.Errorf("user %q, entry point %q", user, entry)
			}
			for _, pin := range pins.FindAll(text, -1) {
				if !bytes.Contains(pinned, pin) {
					t.Errorf("manifests/images/requirements.txt has another version than %s", pin)
				}
			}
			// What the build copies from the tree at its end.
			for _, path := range []string{"LICENSE", "manifests/images/sbom.py"} {
				if !bytes.Contains(text, []byte(path)) {
					t.Errorf("%s is not in the image's build", path)
				}
				read(t, path)
			}
		})
	}
}

func TestAWrongDockerfileIsRefused(t *testing.T) {
	for _, text := range []string{"FROM a\nRUNN b\n", "RUN a\n", "FROM a\nCOPY b\n"} {
		result, err := parser.Parse(strings.NewReader(text))
		if err == nil {
			_, _, err = instructions.Parse(result.AST, linter.New(&linter.Config{}))
		}
		if err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}
